"""Pure computation: decoding, rewards, alignment. Only torch, transformers, tokenizers, safetensors and numpy."""
