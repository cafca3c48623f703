"""The rooms behind the rollout worker: see `rollout.service`."""
