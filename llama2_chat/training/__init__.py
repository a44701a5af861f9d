"""Finetuning on conversations: QLoRA, LoRA or all weights, in the chat's own format, and a report of what changed.

run               from the flags to the reports; what scripts/sft_trainer.py calls
options           the flags
chat_data         conversations that are worth training on, by split
row_sources       rows of files, folders and data sets on the Hub
row_files         JSON Lines, JSON, CSV, Parquet: the rows of a file
row_formats       messages, ShareGPT, Alpaca ...: what a row says
text_formats      conversations that tutorials have written into one text
row_messages      its messages, checked and cleaned, and which answers are learned
row_tools         calls of tools in it, and what they returned
row_pairs         a chosen and a rejected answer
splits            train, eval and test split, or K folds
near_duplicates   conversations that must not be in two splits
examples          conversations as token ids and labels
base_model        the model to train, before its weights
train_one         one training, with all that is kept of it
trainer           TRL's trainers as we use them, and the progress bar
whole_split       what these trainers share: a whole eval split measured at once, divided models saved
sft               its SFTTrainer with an eval loss that weighs all tokens alike
preferences       good and bad answers as token ids, for DPO and KTO
preference_trainers  their trainers, with figures of a whole eval split
draft_run         a head that guesses for a model, from the flags to its folder; the other draft_... are its parts
losses            what a model loses on each conversation
checkpoints       what a killed run goes on from; what must not be overwritten
answers           what the model answers before and after
merging           an adapter becomes part of its base model's weights
resources         memory and disk: how much, and what to do when they run out
processes         of several processes one prints; a model that is divided among them
run_json          run.json, by which an evaluation finds the splits again
curves            losses and learning rate against steps, as CSV and PNG
report            a page of Markdown for a run or for its folds
card              what the Hub is told, and the licence
publishing        a GGUF, and what of a folder is uploaded
ollama            a Modelfile with the model's own format
markdown          tables that nothing breaks
"""
