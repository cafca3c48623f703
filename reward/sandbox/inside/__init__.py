"""What runs inside a sandbox: `reward.sandbox.process` reads it as text and imports none of it."""
