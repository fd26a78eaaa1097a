"""What is asked of learnax at a shell: `python -m learnax COMMAND`, each command in a file of its own.

The room may import every room below the trainer; no room may import it.
"""
