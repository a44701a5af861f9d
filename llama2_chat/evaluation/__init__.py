"""Did a model get better? Its losses beside its base's, lm-evaluation-harness, a judging sheet, signs of overfitting.

evaluation   from the models' names to a report; what scripts/evaluate_model.py calls
options      what was requested
subjects     the models to measure: bases, adapters and merged models, loaded one after another
eval_data    the conversations they are measured on
losses       what the subjects lose on each split
perplexity   losses as perplexities, with a bootstrap interval
harness      tasks of lm-evaluation-harness
questions    which questions the judging sheet asks, and the models' answers
judging      the sheet for people, and what came of it
overfitting  from curves and losses to a sentence
results      everything that was found, as evaluation.json
report       the same as a page of Markdown
figure       and as a figure

Of other things than a model's training: agent_rates and calculator_attacks, which scripts/evaluate_agent.py calls;
retrieval and document_*, which scripts/evaluate_documents.py calls through document_evaluation.
"""
