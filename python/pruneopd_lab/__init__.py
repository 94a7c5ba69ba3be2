"""Around the trainer: the command `pruneopd`, presets with tiny models, comparisons, reports, scores, the demo."""
