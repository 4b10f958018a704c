"""How the built-in model is made and measured: `python -m tools.demo_model train` and `… evaluate`.

From the root of the repository. Nothing of this is installed with Preble.
"""
