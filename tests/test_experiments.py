import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "experiments" / "released_answers.py"


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)


def test_the_paper_s_numbers_come_out(released):
    done = run(released)
    assert done.returncode == 0, done.stderr
    lines = {tuple(line.split()[:3]): line.split()[3:] for line in done.stdout.splitlines()}
    assert lines["chat8b", "default", "published"][:6] == ["560", "545", "15", "0", "97.3", "%"]
    assert lines["nonchat8b", "default", "published"][:4] == ["560", "152", "234", "174"]
    assert lines["early_431", "default", "published"][:6] == ["560", "112", "152", "296", "42.4", "%"]
    assert re.search(r"early_431 +default +published .* 20\.0 % +72\.9 %", done.stdout)


def test_a_missing_folder_is_one_sentence():
    done = run("no-such-folder")
    assert done.returncode == 1
    assert "no-such-folder" in done.stderr
    assert "Traceback" not in done.stderr
