"""What training with learnax costs beside other ways to run the same model, measured: `python -m bench`."""
