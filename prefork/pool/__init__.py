"""The pool of workers: its state, the policy over it, and the two ways in which workers and master tell each other."""
