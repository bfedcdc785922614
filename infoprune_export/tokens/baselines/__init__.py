"""Published selectors of visual tokens, and the controls that any of them must beat, behind one interface.

None of them is part of an exported graph. Some things are the same for all, whatever the paper does, so that a
comparison shows the choice of tokens and nothing else:

- an image of n tokens keeps exactly ceil(n * keep_ratio), at most as many where the image itself is made smaller;
- kept tokens stand in image order, at the positions that ``tokens.positions`` asks for;
- no [CLS] token is passed on, and LLaVA-NeXT's newlines are not; its tiles share one budget;
- ties go to the lowest index, and what is not finite counts as zero.

Without a [CLS] token (SigLIP, Qwen) methods that rank by its attention take what each token receives from all others,
which is how their authors and others have ported them.
"""
