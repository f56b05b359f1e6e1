// Browsers do not start workers for a page that was opened from a file. The search then runs in a hidden frame.
"use strict";
(() => {
  if (location.protocol !== "file:") return;
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      this.listener = (event) => {
        if (event.source !== inside) return;
        const message = new MessageEvent("message", { data: event.data });
        this.dispatchEvent(message);
        if (this.onmessage) this.onmessage(message);
      };
      window.addEventListener("message", this.listener);
      inside.document.open();
      inside.document.write(
        `<body><script>postMessage = (data) => parent.postMessage(data, "*");</` +
          `script><script src="${url}"></` + `script></body>`,
      );
      inside.document.close();
      // Added here, because document.open() removes all listeners.
      this.loaded = new Promise((resolve) => inside.addEventListener("load", resolve));
    }

    postMessage(data) {
      this.loaded.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      window.removeEventListener("message", this.listener);
      this.frame.remove();
    }
  };
})();
