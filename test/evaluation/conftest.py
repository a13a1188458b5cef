import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # bench_gpu_side.py is imported by name
