"""The torch files that an exported model carries: its config, its network, its processor. They run without this
package, and nothing here imports them; `tools.export_to_hf` copies them beside the weights."""
