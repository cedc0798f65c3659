"""`python -m proxy.cli` is `glasshouse`."""

from proxy.cli import main

if __name__ == "__main__":
    main(prog_name="glasshouse")
