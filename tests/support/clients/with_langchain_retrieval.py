"""LangChain: a chain that retrieves pages of a document which this server has read, and a chat to which it quotes."""

import sys

import httpx
import openai
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_openai import ChatOpenAI

url, model = sys.argv[1:]
PAGES = ["The lighthouse of Brenzano was built in 1874.", "Its keeper was Ottavio Ferrandini.", "Seabirds nest below."]
QUESTION = "Who was its keeper?"

visitor = httpx.Client()  # it keeps the cookie by which the server knows whose documents these are
files = openai.OpenAI(base_url=url, api_key="none", http_client=visitor).files
file = files.create(file=("report.txt", "\f".join(PAGES).encode()), purpose="user_data")
assert files.wait_for_processing(file.id, poll_interval=0.1, max_wait_seconds=120).status == "processed"


class Pages(BaseRetriever):
    """The page of the document that shares most words with a question."""

    def _get_relevant_documents(self, query, *, run_manager):
        pages = [visitor.get(f"{url}/files/{file.id}/pages/{page}").json() for page in range(1, len(PAGES) + 1)]
        words = {*query.lower().strip("?").split()}
        best = max(pages, key=lambda page: len(words & {*page["text"].lower().strip(".").split()}))
        return [Document(best["text"], metadata={"page": best["page"]})]


server = {"base_url": url, "api_key": "none", "model": model, "temperature": 0, "max_retries": 0, "max_tokens": 8}
chat = ChatOpenAI(**server, http_client=visitor)
prompt = ChatPromptTemplate.from_messages([("system", "Answer from this: {context}"), ("user", "{question}")])


def said(pages):
    return "\n".join(page.page_content for page in pages)


answering = RunnablePassthrough.assign(context=lambda found: said(found["context"])) | prompt | chat | StrOutputParser()
retrieving = {"context": Pages(), "question": RunnablePassthrough()}
chain = retrieving | RunnablePassthrough.assign(answer=answering)

whole = chain.invoke(QUESTION)
assert [page.metadata for page in whole["context"]] == [{"page": 2}]
assert whole["answer"]
assert "".join(piece.get("answer", "") for piece in chain.stream(QUESTION)) == whole["answer"]

quoted = chat.bind(extra_body={"documents": [file.id]})
assert (
    quoted.invoke(QUESTION).usage_metadata["input_tokens"] > chat.invoke(QUESTION).usage_metadata["input_tokens"] + 30
)
