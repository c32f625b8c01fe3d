"""The torch files that an exported model carries: its config, its network, its processor. They run without this
package, and nothing here imports them; `calm export` copies them beside the weights."""
