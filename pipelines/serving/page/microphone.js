// Runs beside the page: the microphone's samples in pieces of 20 ms.
"use strict";

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(480);
    this.filled = 0;
  }

  process(inputs) {
    for (const sample of inputs[0]?.[0] ?? []) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
