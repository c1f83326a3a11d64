"""The L of PSLA: classes, their relations, and labels that annotators left out."""
