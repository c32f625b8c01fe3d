"""From a trained model and pictures to words and scores."""
