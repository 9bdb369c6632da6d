"""python -m eval.attack: a summariser under attack by synonyms."""

from eval.attack.run import main

if __name__ == "__main__":
    main()
