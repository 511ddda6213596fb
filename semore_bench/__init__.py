"""The harness around semore-bench's agents: environments, replay, runs, evaluation, tables and plots."""

__version__ = "0.1.0"
