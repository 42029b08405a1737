"""The task LLM: a problem in, worked steps and an answer out; the answer's last line is `Answer: …`."""

from srl_rlvr.model_types.kinds.text import TextType

TYPE = TextType(
    name="task_llm",
    metric="accuracy",
    instruction="Solve the problem step by step, one step a line. The last line is 'Answer: ' and the result.",
)
