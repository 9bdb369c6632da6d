import sys

if "." not in (__package__ or ""):  # a file by its name finds no package
    print("python -m eval.report: error: type it like this, in the folder that holds eval/", file=sys.stderr)
    sys.exit(2)

try:
    from eval.report.terminal import main
except ModuleNotFoundError as e:
    if e.name not in ("matplotlib", "jinja2"):
        raise
    print(f"python -m eval.report: error: the report needs {e.name} ({e}); pip install {e.name}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
