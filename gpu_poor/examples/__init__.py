"""Runnable examples: ``from gpu_poor.examples import demo; demo.demo_production_ready("gpt2")``."""
