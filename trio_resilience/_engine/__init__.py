"""What the primitives share: waiting for a job, driving an operation, time limits, the base class."""
