"""``python -m slimgrad``: the command line, from a checkout that is not installed too."""

from slimgrad.cli.main import main

if __name__ == "__main__":
    main(prog_name="slimgrad")
