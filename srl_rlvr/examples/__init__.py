"""Where Example tables come from: generated families (`generated`) and the user's own files (`files`).

    families   what can be generated, and our expert for each family
    generated  families → Example tables; train and held-out never meet
    files      JSON lines → Example tables
    steps      how a solution is written as steps

An expert's steps never hold the final "Answer: …" line: the model type writes that from the reference.
Nothing here knows a tokenizer, a stage, a policy or Ray.
"""
