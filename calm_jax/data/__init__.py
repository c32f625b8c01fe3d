"""From records of pictures and what is known of them to batches of packed rows. Imports the config only."""
