// Browsers start no worker from a file that was opened from disk; the search is one. There, its script runs in a
// hidden frame instead, which offers what the search uses of a worker: postMessage and onmessage, both ways.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = (this.inner = frame.contentWindow);
      const deliver = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      inner.document.open();
      inner.document.write("<!doctype html><title></title>");
      inner.document.close();
      // what a worker's own postMessage, importScripts and self are
      inner.self = inner;
      inner.postMessage = (data) => setTimeout(() => deliver(data));
      inner.importScripts = (...urls) =>
        urls.reduce((before, each) => before.then(() => new Promise((resolve) => {
          const script = inner.document.createElement("script");
          script.src = each;
          script.onload = script.onerror = resolve;
          inner.document.body.append(script);
        })), Promise.resolve());
      this.ready = inner.importScripts(url);
    }
    postMessage(data) {
      this.ready.then(() => {
        const event = new MessageEvent("message", { data });
        this.inner.dispatchEvent(event);
      });
    }
    terminate() {}
  };
}
