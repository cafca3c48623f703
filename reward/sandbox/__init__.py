"""Untrusted code under limits: what may be used, what isolates, how a run ended."""

from reward.sandbox.isolation import Isolation
from reward.sandbox.limits import Limits, SandboxConfig
from reward.sandbox.runner import Sandbox, find_isolation, shared_sandbox
from reward.sandbox.types import Outcome

__all__ = [
    "Isolation",
    "Limits",
    "Outcome",
    "Sandbox",
    "SandboxConfig",
    "find_isolation",
    "shared_sandbox",
]
