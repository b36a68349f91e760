"""What the primitives share: joining a job, driving an operation, time limits, the base class."""
