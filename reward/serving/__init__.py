"""The rooms behind the scoring API: see `reward.service`."""
