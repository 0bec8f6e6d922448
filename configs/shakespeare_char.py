"""nanoGPT's CPU setting on tinyshakespeare characters, with Griffin's pattern.

    hybridlm train shakespeare_char --data.path=tinyshakespeare.txt --out runs/shakespeare_char

4 layers, width 128, context 64, batch 12, 2,000 steps, no dropout: nanoGPT reports a validation loss of 1.88 nats per
character for a transformer. The text is ASCII, so a byte is a character. shakespeare_char_hawk and
shakespeare_char_transformer swap the pattern at equal parameters. As in nanoGPT the last tenth is held out.
"""

from hybridlm.config import RGLRU, AdamW, Attention, Block, Config, Cosine, Data, Eval, GeGLU, Model, Train

ffn = GeGLU(hidden=384)
# Width 152 gives as many parameters as the attention block. With the paper's longer memories, made for contexts of
# thousands of tokens, the validation loss is 0.05 higher.
recurrent = Block(mixer=RGLRU(width=152, num_heads=8, init="recurrentgemma"), ffn=ffn)
local_attention = Block(mixer=Attention(num_heads=4, num_kv_heads=4, window=32), ffn=ffn)

config = Config(
    model=Model(vocab_size=320, width=128, num_layers=4, pattern=(recurrent, recurrent, local_attention)),
    data=Data(source="text", path="tinyshakespeare.txt", seq_len=64, validation_fraction=0.1),
    optimizer=AdamW(peak_lr=2e-3, b2=0.99, schedule=Cosine(warmup_steps=100)),
    train=Train(steps=2000, batch_size=12, log_every=50),
    eval=Eval(every=500),
)
