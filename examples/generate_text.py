"""The shipped model answers, token by token, with a KV cache; and what each phase of it took."""

from minillm import TextGenerator
from minillm.measure import profile

SAID = "My favourite dish is ramen. It rained all day. What is my favourite dish?"

generator = TextGenerator()  # the checkpoint in minillm/checkpoints/small, 0.9 million parameters
print(SAID)
with profile() as report:
    for piece in generator.stream_text(SAID, max_new_tokens=30, temperature=0):  # 0 is greedy
        print(piece, end="", flush=True)
print("\n")
print(report)  # prefill reads the prompt at once; decode writes one token a step
