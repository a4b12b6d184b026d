"""Writes TRAIN.md's table of the flags of inference_solver.py, from its parser.

python exps/inference_table.py
"""

import re
import sys
from pathlib import Path

MANUAL = Path(__file__).resolve().parents[1] / "TRAIN.md"
sys.path.insert(0, str(MANUAL.parent))
from inference_solver import build_parser  # noqa: E402

TABLE_BEGIN = "<!-- The table is written by python exps/inference_table.py. -->\n"
TABLE_END = "<!-- End of the flags of inference_solver.py. -->\n"


def flag_table() -> str:
    rows = ["| Flag | Default | Meaning |", "|---|---|---|"]
    # All but --help.
    for action in build_parser()._actions[1:]:
        meaning, default = re.fullmatch(r"(.*?)(?: \(default:? (.*)\))?", action.help).groups()
        default = "required" if action.required else (default or "off") % {"default": action.default}
        name = action.option_strings[0] + (f" {{{','.join(action.choices)}}}" if action.choices else "")
        rows.append(f"| `{name}` | {default} | {meaning} |".replace("<|", r"<\|").replace("|>", r"\|>"))
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    table = f"{TABLE_BEGIN}{flag_table()}{TABLE_END}"
    MANUAL.write_text(re.sub(f"{TABLE_BEGIN}.*{TABLE_END}", lambda _: table, MANUAL.read_text(), flags=re.DOTALL))
