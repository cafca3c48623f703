"""Judging: rules, a reward model with a head per signal, and the declared tree that joins them."""
