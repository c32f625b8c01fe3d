"""Words: tokenizers, chat templates, and the conversation that a Sample becomes."""
