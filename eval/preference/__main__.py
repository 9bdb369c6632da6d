"""The human study: a page that shows raters two arms' texts side by side, and what their votes say.

python -m eval.preference make runs/A runs/B --items 200 --out study
python -m eval.preference tally study/votes-*.json

Raters get study/study.html alone: it works without a network, and keeps and gives out their votes as a file.
study/KEY.json says which side is which arm, and stays with you.
"""

import sys

if "." not in (__package__ or ""):  # a file by its name finds no package
    print("python -m eval.preference: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

from eval.preference import study, tally
from runtime.cli import Parser, user_errors
from runtime.process import command


@command
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.preference", usage=None, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in (study, tally):
        text = part.__doc__.splitlines()[0]
        name = "make" if part is study else "tally"
        one = commands.add_parser(name, help=text, usage=None, description=part.__doc__)
        part.add_flags(one.add_argument)
        one.set_defaults(run=part.run)
    args = parser.parse_args(argv)
    with user_errors():
        args.run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
