"""Image-text data: sources of samples, replayable views of them, and the batches a run trains on."""
