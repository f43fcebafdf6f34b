"""`python -m cmapkd`: the command line, for launchers that start a module (torchrun, accelerate launch)."""

from cmapkd.cli import main

if __name__ == "__main__":
    main()
