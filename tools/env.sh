# shellcheck shell=bash
# Source me (bash): the environment every command of this repository runs in.
#
#   source tools/env.sh
#
# ROS 2 comes from /opt/ros where it is installed, else from the wheels in .venv; the built colcon
# workspace is put on top. What the caller has already set wins. Nothing is installed here: that
# is tools/setup.sh.

_sp_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_sp_venv=$_sp_root/.venv

# Prepends a folder to a path variable, once.
_sp_prepend() {
    case ":${!1-}:" in
        *":$2:"*) ;;
        *) export "$1=$2${!1:+:${!1}}" ;;
    esac
}

# The ROS 2 installation to use: $ROS_DISTRO's, else the newest in /opt/ros, else nothing (wheels).
_sp_ros_prefix() {
    local newest='' setup
    if [ -n "${ROS_DISTRO-}" ] && [ -f "/opt/ros/$ROS_DISTRO/setup.bash" ]; then
        echo "/opt/ros/$ROS_DISTRO"
        return
    fi
    for setup in /opt/ros/*/setup.bash; do
        [ -f "$setup" ] && newest=${setup%/setup.bash}
    done
    echo "$newest"
}

# The vendor's astribot_msgs where its workspace has been sourced: it wins over ours.
_sp_vendor_msgs() {
    local prefix
    local IFS=:
    for prefix in ${AMENT_PREFIX_PATH-}; do
        case $prefix in "$_sp_root"/*) continue ;; esac
        if [ -f "$prefix/share/astribot_msgs/package.xml" ]; then
            echo "$prefix"
            return
        fi
    done
}

# Drops every entry at or below a folder from a path variable.
_sp_drop() {
    local entry kept=''
    local IFS=:
    for entry in ${!1-}; do
        case $entry/ in "$2"/*) ;; *) kept=$kept${kept:+:}$entry ;; esac
    done
    export "$1=$kept"
}

# The generated set-up scripts read variables that may be unset, so a caller's `set -u` rests.
_sp_source() {
    local nounset=0
    case $- in *u*) nounset=1 ;; esac
    set +u
    # shellcheck source=/dev/null
    source "$1"
    [ "$nounset" = 0 ] || set -u
}

_sp_opt=$(_sp_ros_prefix)
_sp_prepend PATH "$_sp_venv/bin"
if [ -n "$_sp_opt" ]; then
    # Adds only what is not there yet: a workspace that is already sourced stays in front.
    _sp_source "$_sp_opt/setup.bash"
else
    _sp_prepend AMENT_PREFIX_PATH "$_sp_venv"
    for _sp_dir in "$_sp_venv"/lib/python3*/site-packages/ros_*.libs "$_sp_venv/lib"; do
        [ -d "$_sp_dir" ] && _sp_prepend LD_LIBRARY_PATH "$_sp_dir"
    done
    export _ROS_WHEELS_BOOTSTRAP_COMPLETE=1 # else importing rclpy starts Python a second time
    export ROS_DISTRO=jazzy ROS_VERSION=2 ROS_PYTHON_VERSION=3
fi
if [ -f "$_sp_root/ros2_ws/install/local_setup.bash" ]; then
    _sp_source "$_sp_root/ros2_ws/install/local_setup.bash"
fi
_sp_prepend PYTHONPATH "$_sp_root"
SAFE_PRUNER_VENDOR_MSGS=$(_sp_vendor_msgs)
export SAFE_PRUNER_VENDOR_MSGS SAFE_PRUNER_ROS=${_sp_opt:-$_sp_venv}
if [ -n "$SAFE_PRUNER_VENDOR_MSGS" ]; then
    for _sp_variable in AMENT_PREFIX_PATH CMAKE_PREFIX_PATH LD_LIBRARY_PATH PYTHONPATH; do
        _sp_drop "$_sp_variable" "$_sp_root/ros2_ws/install/astribot_msgs"
    done
fi

export RMW_IMPLEMENTATION=${RMW_IMPLEMENTATION:-rmw_fastrtps_cpp}
# The robot is on domain 25. Whoever has said nothing gets a domain of this machine only, so that
# a twin started beside a robot never commands it.
export ROS_AUTOMATIC_DISCOVERY_RANGE=${ROS_AUTOMATIC_DISCOVERY_RANGE:-LOCALHOST}
export ROS_DOMAIN_ID=${ROS_DOMAIN_ID:-77}
export FASTRTPS_DEFAULT_PROFILES_FILE=${FASTRTPS_DEFAULT_PROFILES_FILE:-$_sp_root/config/fastdds.xml}

# How MuJoCo draws: what set-up found to work, else the software renderer where it is installed.
if [ -z "${MUJOCO_GL-}" ]; then
    if [ -f "$_sp_root/.setup/mujoco_gl" ]; then
        MUJOCO_GL=$(<"$_sp_root/.setup/mujoco_gl")
    elif /sbin/ldconfig -p 2>/dev/null | grep -q libOSMesa; then
        MUJOCO_GL=osmesa
    else
        MUJOCO_GL=egl
    fi
    export MUJOCO_GL
fi

unset -f _sp_prepend _sp_drop _sp_ros_prefix _sp_vendor_msgs _sp_source
unset _sp_root _sp_venv _sp_opt _sp_dir _sp_variable
