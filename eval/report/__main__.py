import sys

try:
    from eval.report.terminal import main
except ModuleNotFoundError as e:
    if e.name != "matplotlib":
        raise
    print(f"python -m eval.report: error: the report needs matplotlib ({e}); pip install matplotlib", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
