"""`python -m semore_bench`: the same as `semore-bench`."""

from semore_bench.cli import main

if __name__ == "__main__":
    main()
