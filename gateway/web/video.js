// Frames of a video file or a camera, decoded by the browser.

/** Resolve with the next event of a kind; reject if the media fails first. */
function next(media, kind) {
  return new Promise((resolve, reject) => {
    media.addEventListener(kind, resolve, { once: true });
    media.addEventListener("error", () => reject(new Error("The browser cannot play this video.")), {
      once: true,
    });
  });
}

/** Resolve with the media time of the frame that is presented next. */
function presented(media) {
  return new Promise((resolve) => {
    media.requestVideoFrameCallback((_, { mediaTime }) => resolve(mediaTime));
  });
}

/** Return the frame that a video shows now, as an image file. */
async function grab(media, name, type) {
  const canvas = new OffscreenCanvas(media.videoWidth, media.videoHeight);
  canvas.getContext("2d").drawImage(media, 0, 0);
  return { blob: await canvas.convertToBlob({ type, quality: 0.95 }), name };
}

/** A video file, one frame at a time. */
export class Video {
  /** Open a file in a `<video>` element; rejects if the browser cannot play it. */
  static async open(file, media) {
    const video = new Video();
    video.media = media;
    video.seeking = Promise.resolve();
    media.src = URL.createObjectURL(file);
    await next(media, "loadeddata");
    video.stem = file.name.replace(/\.[^.]*$/, "");
    video.interval = await video.#measure();
    video.length = Math.max(1, Math.round(media.duration / video.interval));
    return video;
  }

  /** Return the seconds between frames: browsers do not report them, so play a few and measure. */
  async #measure() {
    const over = next(this.media, "ended").then(() => Infinity);
    const times = [];
    this.media.playbackRate = 0.5;
    await this.media.play();
    while (times.length < 8 && !this.media.ended) {
      times.push(await Promise.race([presented(this.media), over]));
    }
    this.media.pause();
    const gaps = times.slice(1).map((time, i) => time - times[i]);
    return Math.min(this.media.duration, ...gaps.filter((gap) => gap > 0));
  }

  /** Return frame `index`, from 0, as a PNG; calls are served one after the other. */
  frame(index) {
    this.seeking = this.seeking.then(() => this.#seek(index));
    return this.seeking;
  }

  async #seek(index) {
    const sought = next(this.media, "seeked");
    this.media.currentTime = (index + 0.5) * this.interval;
    await sought;
    return grab(this.media, `${this.stem}_${String(index).padStart(6, "0")}.png`, "image/png");
  }

  /** Release the file. */
  close() {
    URL.revokeObjectURL(this.media.src);
    this.media.removeAttribute("src");
    this.media.load();
  }
}

/** The camera, live. */
export class Camera {
  /** Open the camera in a `<video>` element; rejects if there is none or it is not allowed. */
  static async open(media) {
    if (!navigator.mediaDevices) {
      throw new Error("Browsers allow the camera on https:// and on localhost only.");
    }
    const camera = new Camera();
    camera.media = media;
    const video = { width: { ideal: 640 }, facingMode: "environment" };
    media.srcObject = await navigator.mediaDevices.getUserMedia({ video });
    await media.play();
    return camera;
  }

  /** Return the next two frames; frames since the last pair are dropped. */
  async pair() {
    await presented(this.media);
    const first = await grab(this.media, "camera_1.jpg", "image/jpeg");
    await presented(this.media);
    return [first, await grab(this.media, "camera_2.jpg", "image/jpeg")];
  }

  /** Switch the camera off. */
  close() {
    for (const track of this.media.srcObject.getTracks()) track.stop();
    this.media.srcObject = null;
  }
}
