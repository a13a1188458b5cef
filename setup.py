"""ament_python packaging: `colcon build` and `ros2 run safe_pruner_node ...` read this."""

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "safe_pruner_node"
SHARE = Path("share") / PACKAGE


def shared(folder: str) -> list[tuple[str, list[str]]]:
    """Lists every file below a folder for installation in the same place under share/."""
    found = Path(folder).rglob("*")
    files = sorted(p for p in found if p.is_file() and p.suffix != ".pyc")
    return [(str(SHARE / path.parent), [str(path)]) for path in files]


setup(
    name=PACKAGE,
    version="0.1.0",
    description="A pi0.5 policy with SAFE-Pruner on an Astribot S1.",
    license="Apache-2.0",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: ["py.typed"], f"{PACKAGE}.engine.cuda": ["*.cu", "*.cuh"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (str(SHARE), ["package.xml"]),
        *shared("launch"),
        *shared("config"),
        *shared("calibration"),
        *shared("checkpoints/nano"),
    ],
    # Versions are pinned in requirements/, and ROS 2 packages are declared in package.xml.
    install_requires=["setuptools"],
    extras_require={"test": ["pytest"]},  # how colcon test knows that pytest runs the tests
    python_requires=">=3.10",
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "bench = safe_pruner_node.evaluation.bench:main",
            "demo = safe_pruner_node.evaluation.demo:main",
            "demonstrations = safe_pruner_node.demonstrations.generate:main",
            "evaluate = safe_pruner_node.evaluation.evaluate:main",
            "forecast_study = safe_pruner_node.evaluation.forecast_study:main",
            "policy_node = safe_pruner_node.nodes.policy_node:main",
            "train = safe_pruner_node.training.train:main",
            "twin_node = safe_pruner_node.nodes.twin_node:main",
        ],
    },
)
