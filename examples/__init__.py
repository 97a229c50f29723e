"""Scripts for a checkout; the code behind them is the library's ``gpu_poor.examples``."""
