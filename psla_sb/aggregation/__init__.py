"""The A of PSLA: more from checkpoints that are already paid for."""

from psla_sb.aggregation.averaging import average_weights

__all__ = ["average_weights"]
