import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_the_cost_of_a_round_is_measured_for_every_way_to_train():
    options = ["--batch", "4", "--image_size", "32", "--classes", "5", "--columns", "3", "--repeats", "1"]
    command = [sys.executable, str(BENCHMARKS / "cost" / "round.py"), *options]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for way in ("joint", "plain", "fresh", "cached", "authors", "encoders_alone", "surgery_alone"):
        assert f"\n{way} " in printed
    assert "fresh / authors' order of work:" in printed
