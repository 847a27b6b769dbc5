"""Measures what this machine makes of the package; every figure with its spread, beside what the hardware can do."""

from nanollada.scripts.benchmarks.machine import main

if __name__ == "__main__":
    main()
