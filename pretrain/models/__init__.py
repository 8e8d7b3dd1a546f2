"""Networks only: no losses, no devices, no logging. See `docs/architecture.md` for how the parts combine."""
