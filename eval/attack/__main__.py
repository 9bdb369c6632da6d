"""python -m eval.attack: a summariser under attack by synonyms."""

import sys

if "." not in (__package__ or ""):  # a file by its name finds no package
    print("python -m eval.attack: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

from eval.attack.run import main

if __name__ == "__main__":
    main()
