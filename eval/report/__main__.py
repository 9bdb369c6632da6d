import sys

try:
    from eval.report.terminal import main
except ModuleNotFoundError as e:
    if e.name not in ("matplotlib", "jinja2"):
        raise
    print(f"python -m eval.report: error: the report needs {e.name} ({e}); pip install {e.name}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
